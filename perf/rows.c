#include "rows.h"

#include "ultraep.h"

#include <string.h>

enum { ROW_ID_BITS = 56, ROW_RANK_BITS = 14, ROW_TOKEN_BITS = 28 };

rowShape_t rowShape(int32_t type, int32_t hidden) {
  size_t element = type == ULTRAEP_FLOAT32 ? 4 : type == ULTRAEP_FLOAT8 ? 1 : 2;
  return (rowShape_t){.type = type, .hidden = hidden, .bytes = element * (size_t)hidden};
}

const char *rowTypeName(int32_t type) {
  static const char *const names[] = {"bfloat16", "half", "float", "fp8"};
  return type >= 0 && type < 4 ? names[type] : "?";
}

/* ---- numbers ---- */

static uint32_t row_float_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

static float row_bits_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

static uint16_t row_bfloat16_round(float value) {
  uint32_t bits = row_float_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((bits >> 16) | 0x40u);
  return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

static uint16_t row_half_round(float value) {
  uint32_t bits = row_float_bits(value), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return (uint16_t)(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u); /* 65520 and more round to infinity */
  if (magnitude < 0x38800000u) {
    /* Below 2^-14 halves are multiples of 2^-24: adding 0.5, whose last bit is 2^-24, rounds to that. */
    float shifted = row_bits_float(magnitude) + 0.5f;
    return (uint16_t)(sign | (row_float_bits(shifted) - row_float_bits(0.5f)));
  }
  uint32_t rounded = magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u);
  return (uint16_t)(sign | (rounded >> 13));
}

static float row_half_value(uint16_t half) {
  uint32_t sign = (uint32_t)(half & 0x8000u) << 16, exponent = (half >> 10) & 31u, fraction = half & 0x3ffu;
  if (exponent == 31) return row_bits_float(sign | 0x7f800000u | fraction << 13);
  if (exponent == 0) {
    float value = (float)fraction * 0x1p-24f;
    return sign != 0 ? -value : value;
  }
  return row_bits_float(sign | (exponent + 112) << 23 | fraction << 13);
}

void rowLoad(const rowShape_t *shape, const void *row, float *values) {
  const uint16_t *halves = row;
  const int8_t *codes = row;
  int32_t hidden = shape->hidden;
  switch (shape->type) {
  case ULTRAEP_BFLOAT16:
    for (int32_t j = 0; j < hidden; j++) values[j] = row_bits_float((uint32_t)halves[j] << 16);
    break;
  case ULTRAEP_FLOAT16:
    for (int32_t j = 0; j < hidden; j++) values[j] = row_half_value(halves[j]);
    break;
  case ULTRAEP_FLOAT8: /* bytes to the library, whole numbers here */
    for (int32_t j = 0; j < hidden; j++) values[j] = codes[j];
    break;
  default:
    memcpy(values, row, shape->bytes);
    break;
  }
}

void rowStore(const rowShape_t *shape, const float *values, void *row) {
  uint16_t *halves = row;
  int8_t *codes = row;
  int32_t hidden = shape->hidden;
  switch (shape->type) {
  case ULTRAEP_BFLOAT16:
    for (int32_t j = 0; j < hidden; j++) halves[j] = row_bfloat16_round(values[j]);
    break;
  case ULTRAEP_FLOAT16:
    for (int32_t j = 0; j < hidden; j++) halves[j] = row_half_round(values[j]);
    break;
  case ULTRAEP_FLOAT8:
    for (int32_t j = 0; j < hidden; j++) codes[j] = (int8_t)values[j];
    break;
  default:
    memcpy(row, values, shape->bytes);
    break;
  }
}

/* ---- contents ---- */

static uint64_t row_hash(uint64_t a, uint64_t b) {
  uint64_t z = a * UINT64_C(0x9e3779b97f4a7c15) + b;
  z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
  z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
  return z ^ (z >> 31);
}

/* Digits of an id: as few elements as hold 16 bytes, 56 bits over them. */
static int row_digits(const rowShape_t *shape) {
  return shape->type == ULTRAEP_FLOAT32 ? 4 : 8;
}

static uint64_t row_id_pack(rowId_t id) {
  return (uint64_t)id.rank | (uint64_t)id.token << ROW_RANK_BITS |
         (uint64_t)(id.iteration & 0x3fffu) << (ROW_RANK_BITS + ROW_TOKEN_BITS);
}

void rowFill(const rowShape_t *shape, void *row, rowId_t id) {
  enum { CHUNK = 256 };
  float values[CHUNK];
  uint64_t packed = row_id_pack(id), hash = row_hash(packed, 1);
  uint32_t start = (uint32_t)hash, step = (uint32_t)(hash >> 32) | 1u;
  int digits = row_digits(shape), bits = ROW_ID_BITS / digits;
  size_t element = shape->bytes / (size_t)shape->hidden;
  for (int32_t first = 0; first < shape->hidden; first += CHUNK) {
    int32_t count = shape->hidden - first < CHUNK ? shape->hidden - first : CHUNK;
    for (int32_t j = 0; j < count; j++) {
      values[j] = (float)((int32_t)((start + (uint32_t)(first + j) * step) >> 27) - 16);
    }
    for (int d = 0; first == 0 && d < digits; d++) {
      values[d] = (float)((packed >> (d * bits)) & ((UINT64_C(1) << bits) - 1));
    }
    rowShape_t chunk = {.type = shape->type, .hidden = count, .bytes = element * (size_t)count};
    rowStore(&chunk, values, (uint8_t *)row + element * (size_t)first);
  }
}

rowId_t rowIdentify(const rowShape_t *shape, const void *row) {
  float values[8];
  int digits = row_digits(shape), bits = ROW_ID_BITS / digits;
  rowShape_t head = rowShape(shape->type, digits);
  uint64_t packed = 0;
  rowLoad(&head, row, values);
  for (int d = 0; d < digits; d++) {
    if (!(values[d] >= 0 && values[d] < (float)(1 << bits))) return (rowId_t){.rank = -1, .token = -1};
    packed |= (uint64_t)values[d] << (d * bits);
  }
  return (rowId_t){.rank = (int32_t)(packed & ((1u << ROW_RANK_BITS) - 1)),
                   .token = (int32_t)(packed >> ROW_RANK_BITS & ((1u << ROW_TOKEN_BITS) - 1)),
                   .iteration = (uint32_t)(packed >> (ROW_RANK_BITS + ROW_TOKEN_BITS))};
}

float rowWeight(int32_t rank, int32_t token, int32_t k) {
  rowId_t id = {.rank = rank, .token = token, .iteration = (uint32_t)k};
  return (float)(1 + row_hash(row_id_pack(id), 2) % 255) / 256.0f;
}

void rowScalesFill(uint8_t *scales, size_t count, rowId_t id) {
  uint64_t packed = row_id_pack(id);
  for (size_t i = 0; i < count; i += 4) {
    uint32_t word = (uint32_t)row_hash(packed, 3 + i);
    memcpy(scales + i, &word, 4);
  }
}

float rowAddend(int32_t expert, int32_t j) {
  return (float)((expert >> (j % 2 == 0 ? 0 : 6)) & 63) - 32.0f;
}

void rowExpert(const rowShape_t *in, const void *row, int32_t expert, const rowShape_t *out, void *result) {
  enum { CHUNK = 256 };
  float values[CHUNK];
  float even = rowAddend(expert, 0), odd = rowAddend(expert, 1);
  size_t inElement = in->bytes / (size_t)in->hidden, outElement = out->bytes / (size_t)out->hidden;
  for (int32_t first = 0; first < in->hidden; first += CHUNK) {
    int32_t count = in->hidden - first < CHUNK ? in->hidden - first : CHUNK;
    rowShape_t inChunk = {.type = in->type, .hidden = count, .bytes = inElement * (size_t)count};
    rowShape_t outChunk = {.type = out->type, .hidden = count, .bytes = outElement * (size_t)count};
    rowLoad(&inChunk, (const uint8_t *)row + inElement * (size_t)first, values);
    for (int32_t j = 0; j < count; j++) values[j] += j % 2 == 0 ? even : odd;
    rowStore(&outChunk, values, (uint8_t *)result + outElement * (size_t)first);
  }
}
