"""The CSI driver: lazyfs mounts as volumes of Kubernetes."""
