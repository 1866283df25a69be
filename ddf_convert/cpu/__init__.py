"""Numba CPU kernels of the DDF operator."""
from ddf_convert import reference
import torch
def forward(i,c,s,*o):
    *g, fmt = o
    return reference.forward(i,c,s,*g).contiguous(memory_format=fmt)
def backward(go,i,c,s,*o):
    *g, needs, fmt = o
    r = reference.backward(go,i,c,s,*g,needs)
    return tuple(i.new_empty(0) if x is None else x.contiguous(memory_format=f) for x,f in zip(r,(fmt,torch.contiguous_format,fmt)))
