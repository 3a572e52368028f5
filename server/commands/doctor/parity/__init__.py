"""`glmserve doctor --parity`: does this machine compute right, and which alternatives are faster here?"""
