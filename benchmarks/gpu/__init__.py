"""What a machine with a GPU can say of fastrnn, in one command: ``python -m benchmarks.gpu``.

__main__    the command line
parts       what is run, in which stage, within how many seconds
cases       the rows of the parts: every op of a backend at every size
supervisor  runs cases in processes that may crash or hang
worker      the process in which they run
measure     what is right, and how long it takes
clock       device time of a call
nodes       the kernels of a training step, one by one
torch_cases what a torch user calls, against nn.RNN
tuner       what the launchers' plans are chosen by
tasks       probe, device, compile ahead, peers, tuner: a process each
record      gpu.json, and joining two of them
report      gpu.md
"""
