"""An interpreter of PTX, to run what nvcc and Triton make of the GPU kernels where there is no GPU.

Every instruction is executed as it is written, inline assembler too, on warps of 32 lanes held in numpy arrays. It was
written from the PTX ISA and from CUTLASS's account of layouts, apart from `csrc/emulator`, so that a mistake in one is
not repeated by the other.

    parser, syntax              PTX text to kernels and instructions
    codegen, instructions*      a basic block to a Python function; one function for each instruction
    warp, lanes, spaces         a warp: divergence and values, lanes together, memory
    cluster, launch             thread blocks, clusters, the order of warps, launches
    memory, copies, tensor_map  memory with bounds, asynchronous copies and their barriers, tensor maps
    tensor_core, wgmma          ldmatrix, stmatrix and mma.sync; the asynchronous products of sm_90
    arithmetic                  number formats, and what numpy lacks
    host, host/                 host code on a fake CUDA runtime, whose launches are interpreted

What is modelled beyond the values:

- Lanes part at branches and meet again. Warps take turns at random (a launch's ``seed``). Where nothing can go on, the
  error says what each warp waits for.
- Fresh memory, shared memory and registers are NaN. An access outside of an allocation, or a misaligned one, is an
  error.
- cp.async lands at once or when it is waited for, a tensor copy at any time after its start.
- mbarrier: arrivals, bytes that are due, phase. Tensor maps are held to cuTensorMapEncodeTiled's rules.
- wgmma reads shared memory when it is issued or when it is waited for. Its sums are NaN until then. It is an error to
  write what it still reads, registers of A included, or registers that it uses without `wgmma.fence`.
- Stores that wgmma or a tensor copy touches need `fence.proxy.async` in between; those of cp.async as well.
- setmaxnreg takes registers from the pool that the launch bounds leave; barriers and memory of a cluster.

What is not: the order of memory (fences other than the proxy's do nothing, and a store is visible at once), races that
no random order brings out, bank conflicts and time, rounding inside the matrix units (sums are float64 within one
instruction, then rounded once), flushing of denormals (`.ftz`), the errors of approximations (ex2, rcp and rsqrt are
exact to float32), what ptxas makes of the PTX, several clusters at a time, programmatic dependent launch, variables in
global memory. An instruction that is not known is an error with its line.
"""
