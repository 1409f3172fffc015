"""The Helm chart, the manifests made from it, and the rules and dashboard it carries."""
