/* What the rows of ultraep_perf hold: values that name their token, and what an expert makes of them.
 *
 * Element j of a row is a small whole number, exact in every data type: the first elements are the digits of
 * an id (source rank, token, iteration), the others pseudo-random in -16..15. Expert e adds low six bits of e
 * - 32 to even elements and the next six to odd ones, so a row that met the wrong expert, or the right one
 * twice, shows. Times a weight (a multiple of 1/256 below 1) a value is still exact in fp32, so that a sum in
 * order of k has one result, whether products are rounded or fused.
 */
#ifndef ULTRAEP_PERF_ROWS_H_
#define ULTRAEP_PERF_ROWS_H_

#include <stddef.h>
#include <stdint.h>

typedef struct {
  int32_t type;   /* ultraepDataType_t: BFLOAT16, FLOAT16, FLOAT32 or FLOAT8 */
  int32_t hidden; /* elements, at least 16 bytes of them */
  size_t bytes;   /* of a row */
} rowShape_t;

typedef struct {
  int32_t rank, token;
  uint32_t iteration; /* 14 bits are kept */
} rowId_t;

rowShape_t rowShape(int32_t type, int32_t hidden);
/* A short name of the type, as nccl-tests has them. */
const char *rowTypeName(int32_t type);

void rowFill(const rowShape_t *shape, void *row, rowId_t id);
/* The id that a row's first elements spell; rank -1 where they spell none. */
rowId_t rowIdentify(const rowShape_t *shape, const void *row);
/* The weight of assignment (token, k). */
float rowWeight(int32_t rank, int32_t token, int32_t k);
/* count bytes (a multiple of 4) of scales for a token. */
void rowScalesFill(uint8_t *scales, size_t count, rowId_t id);

/* What `expert` returns for a row: out may be in where the shapes are equal. FLOAT8 rows come back as
 * BFLOAT16. */
void rowExpert(const rowShape_t *in, const void *row, int32_t expert, const rowShape_t *out, void *result);

/* A row as fp32 values, and values rounded to nearest even as a row. */
void rowLoad(const rowShape_t *shape, const void *row, float *values);
void rowStore(const rowShape_t *shape, const float *values, void *row);
/* Value j of expert's addend. */
float rowAddend(int32_t expert, int32_t j);

#endif
