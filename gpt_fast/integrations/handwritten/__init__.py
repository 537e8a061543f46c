"""GPT-2 as people write it themselves: blocks that are recognised by their parts and by what they compute."""
