"""Run directories, atomic writes, safetensors files, facts about the machine, consoles."""
