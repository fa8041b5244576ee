"Scripts that measure this machine, one question each: python -m benchmarks.<name>."
