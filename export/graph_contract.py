"""The contract of the canonical graph, executable."""
def check_graph(path, plan): pass
