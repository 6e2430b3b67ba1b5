"""superinfer: LLM programs served to a deadline."""
