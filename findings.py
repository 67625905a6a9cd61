"""x"""
def write_results(*a): pass
