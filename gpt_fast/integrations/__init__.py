"""What connects gpt_fast with other libraries; nothing here is imported unless it is asked for."""
