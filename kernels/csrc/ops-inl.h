// Included once by every isa_*.cc, inside that instruction set's own namespace.

OpsTable make_ops_table() { return OpsTable{}; }
