"""The routes that generate: OpenAI's chat, completions and responses, Anthropic's messages, tokenize."""
