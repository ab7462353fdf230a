"""Published checkpoints in and out: folders of config.json, safetensors and a tokenizer, as transformers has them.

`importing` makes a workdir of one, `exporting` makes one of a workdir; training knows nothing of either. A family of
models is a file in `families`.
"""
