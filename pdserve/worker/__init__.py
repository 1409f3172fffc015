"""One rank of an engine: KV memory, model execution and sampling behind the Executor protocol."""
