"""stub"""
def apply(): pass
