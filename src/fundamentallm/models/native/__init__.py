"""The block of the transformer in C++, for CPUs: no chain of operations, no trips to memory.

`block.cpp` computes, from `numbers.h` (sixteen numbers at a time, `wide.h` where the processor's
vectors are shorter), `products.h` with `tiles.h` (bfloat16, on AMX where the processor has it) or
`floats.h` (float32), and `rows.h` (the operations on a row); `library.py` compiles it, and
`block.py` puts it in the place of a model's blocks. `decode.cpp` and `decoding.py` are a step of
generation, likewise.
"""
