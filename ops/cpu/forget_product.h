/* Ends one way of each_product.h. */
#undef NAME
#undef STORED
#undef WIDEN
#undef NARROW
#undef REAL
#undef OF_REAL
#undef STORED_IS_REAL
#undef OPERAND
#undef OF_OPERAND
#undef OPERAND_IS_STORED
#undef PACKING
#undef TRANSPOSE
