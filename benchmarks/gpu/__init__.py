"The cases of benchmarks/kernels.py, a file a chapter."
