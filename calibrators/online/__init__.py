"""Online learners: what the online kinds are made of.

Each learns from one labelled row after the other. All arithmetic is scalar float64 in a written order, so a state is a
function of the sequence of rows alone: the same rows give the same bits, however they were divided into calls.
"""
