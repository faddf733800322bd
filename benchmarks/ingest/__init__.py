"""`genatt prepare` from S3 against one Polars script: time, memory, equal results.

server            an S3 server on 127.0.0.1, in a process of its own, that counts what it serves
polars_reference  the script (a process of its own)
pipeline          `prepare`, timed (a process of its own)
compare           are the two results equal?
run               the turns: start, watch, compare; rows, medians and the verdict
draw              the plot
"""
