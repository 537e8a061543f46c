"""Connections of gpt_fast with other libraries. Each is imported when a caller asks for it."""
