"""The CSI driver: lazyfs mounts as Kubernetes volumes."""
