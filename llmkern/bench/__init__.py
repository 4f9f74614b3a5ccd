"""The benchmark harness: llmkern against torch, case by case, on the machine it runs on.

`python -m llmkern bench` is the way in. Needs the extra `llmkern[bench]` for its tables, figures
and training log.
"""
