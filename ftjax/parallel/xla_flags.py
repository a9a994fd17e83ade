"""stub"""


def apply():
    pass
