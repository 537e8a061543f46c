"""Instruction sets that a wheel holds one full extension module for each. No imports: setup.py runs this file."""

# The compiler's flags by level, the best last. AVX-512 without bfloat16 products is Skylake to Ice Lake.
LEVELS = {
    "avx2": ("-march=x86-64-v3",),
    "avx512": ("-march=x86-64-v4",),
    "avx512_bf16": ("-march=x86-64-v4", "-mavx512bf16", "-mavx512vnni"),
}
