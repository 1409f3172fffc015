"""What needs a Kubernetes API server: `make test-k8s` with KUBECONFIG."""
