"""Decoder models: configuration, layers, weights. Needs torch and safetensors, never transformers."""
