"""The CPU kernels in C++: one library, shared by the `native` kernels and the `native` attention backend.

Not a plugin kind: it holds what the two have in common. `library` finds and loads what the install built.
"""
