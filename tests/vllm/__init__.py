"""Does vLLM load an exported model and give raylava's answers? Run by `make check-vllm`, not by the test suite."""
