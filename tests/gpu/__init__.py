"""The project on a GPU: golden numbers, photometry, epochs, evaluations and a resumed run.

    bash scripts/on_gpu.sh                    on a machine with a CUDA device
    pytest tests/gpu                          the same tests, skipped where there is none
    pytest tests/gpu --device cpu             on the CPU, so that the tests themselves are tested
    pytest tests/gpu --device cpu -k "not test_runs"     without the training runs
    pytest tests/gpu -m "slow or not slow"    also the compiled network

Tolerances are constants at the top of each module. float32 is compared without TensorFloat-32, whose
10 bits are no parity. bfloat16 is compared with the float32 golden numbers, at about three times the
difference that was measured on a CPU, where a rounding has the same 8 bits. What is exact on a CPU and
decided by comparisons, such as labels, neighbours and predictions, is exact here too. Training is not:
cuDNN chooses the algorithm that was fastest in a trial, and kernels add in any order.

One GPU cannot hold two processes of NCCL. So nothing here runs NCCL's collectives, SyncBatchNorm and
DistributedDataParallel on GPUs, nor a resumed run on several of them; gloo tests all these on a CPU.
"""
