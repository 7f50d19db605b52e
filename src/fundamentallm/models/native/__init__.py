"""The block of the transformer in C++, for CPUs: no chain of operations, no trips to memory.

`block.cpp` computes, from `numbers.h` (sixteen numbers at a time), `tiles.h` (products, on AMX
where the processor has it) and `rows.h` (the operations on a row); `library.py` compiles it, and
`block.py` puts it in the place of a model's blocks.
"""
