"""Models as plain PyTorch: what an exported folder has as its own code where transformers has no such architecture.

`modeling_attnlab.py` is the stack, `parts.py` what mixers share, and every other file one mixer of its name: the class
`Form` computes the mixer's definition position by position or by all pairs, with no kernels. Adding a mixer is adding
its file. It states, as plain tuples that are read without running it,

    READS    the knobs that it computes, in all their values
    IGNORED  knobs that change speed or training alone

A knob in neither is to be at its default, or the export is refused. Modules and parameters of a form have the names of
the mixer's own. `attnlab.interchange.families.attnlab` writes the files; only they need torch and transformers.
"""
