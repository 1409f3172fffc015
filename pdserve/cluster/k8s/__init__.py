"""Engines whose machines are pods: what holds them is scaled over the Kubernetes API.

Only `client` imports the extra k8s, and it is imported when there is a cluster to talk to.
"""
