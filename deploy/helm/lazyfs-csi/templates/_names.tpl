{{/* Names are of the release, so that two can be installed. */}}
{{- define "lazyfs.name" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name | trunc 50 | trimSuffix "-" }}
{{- else }}{{ printf "%s-%s" .Release.Name .Chart.Name | trunc 50 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{/* What selects the pods of a component, given (list . "node"). */}}
{{- define "lazyfs.selector" -}}
app.kubernetes.io/name: {{ (index . 0).Chart.Name }}
app.kubernetes.io/instance: {{ (index . 0).Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end }}

{{- define "lazyfs.labels" -}}
{{ include "lazyfs.selector" . }}
app.kubernetes.io/version: {{ (index . 0).Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ (index . 0).Release.Service }}
helm.sh/chart: {{ printf "%s-%s" (index . 0).Chart.Name (index . 0).Chart.Version }}
{{- end }}

{{/* A reference to an image, given (list . "lazyfs"). */}}
{{- define "lazyfs.image" -}}
{{- $root := index . 0 -}}
{{- $image := index $root.Values.images (index . 1) -}}
{{- if not $image.registry }}
{{- fail (printf "images.%s.registry is not set: name the registry, yours, that has the image %s:%s (docs/INSTALL.md says how it gets there)" (index . 1) $image.repository ($image.tag | default $root.Chart.AppVersion)) }}
{{- end }}
{{- $name := printf "%s/%s" $image.registry $image.repository -}}
{{- if $image.digest }}{{ $name }}@{{ $image.digest }}
{{- else }}{{ $name }}:{{ $image.tag | default $root.Chart.AppVersion }}
{{- end }}
{{- end }}

{{- define "lazyfs.pullSecrets" -}}
{{- with .Values.imagePullSecrets -}}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end }}

{{/* Of a container that needs nothing of the node. */}}
{{- define "lazyfs.confined" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{/* Of a container that uses a socket of the node or of a privileged container, and nothing else. root,
   because the directories of these sockets are root's. spc_t: where SELinux is on, other processes
   may not use them. */}}
{{- define "lazyfs.socketsOnly" -}}
runAsUser: 0
seLinuxOptions: {type: spc_t}
{{ include "lazyfs.confined" . }}
{{- end }}

{{/* Of the node plugin, on the node: its socket, what it remembers, and where its daemons mount. */}}
{{- define "lazyfs.pluginDir" -}}
{{ .Values.kubeletDir }}/plugins/{{ .Values.driverName }}
{{- end }}

{{/* Where the node plugin and the keeper meet, on the node: in /run, because a socket is of no use
   after a reboot. */}}
{{- define "lazyfs.keeperDir" -}}
/run/{{ .Values.driverName }}
{{- end }}

{{/* Where the node plugin and the cache of the fleet meet, on the node. */}}
{{- define "lazyfs.fleetDir" -}}
/run/{{ .Values.driverName }}-fleet
{{- end }}

{{/* Where the plugin finds the disks of the cache. */}}
{{- define "lazyfs.cacheDir" -}}
{{- $places := list -}}
{{- range $index, $disk := .Values.cache.disks }}{{ $places = append $places (printf "/cache/%d" $index) }}{{ end -}}
{{- join ":" $places | default "none" }}
{{- end }}

{{/* What volumes may set, the same for node plugin and controller. */}}
{{- define "lazyfs.rules" -}}
- --log-format={{ .Values.logFormat }}
{{- with .Values.volumes.allowAttributes }}
- --allow-attributes={{ join "," . }}
{{- end }}
{{- with .Values.volumes.maxMemoryLimit }}
- --max-memory-limit={{ . }}
{{- end }}
{{- end }}

{{/* Mount options of volumes that do not set them, as environment of node plugin and controller. */}}
{{- define "lazyfs.defaults" -}}
{{- $lines := list -}}
{{- range $name, $value := .Values.volumes.defaults -}}
{{- $lines = append $lines (printf "- {name: LAZYFS_%s, value: %s}" ($name | snakecase | upper) ($value | quote)) -}}
{{- end -}}
{{- join "\n" $lines }}
{{- end }}
