"""Running and scoring GGUF files: the llama.cpp engine and the domain scores."""
