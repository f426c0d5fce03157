/* Reads a JSON document and prints the value at a place: perf_json FILE [NAME|INDEX]... Status 1 where the
 * file is not JSON, or has no such place. */
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>

int main(int argc, char **argv) {
  json_error_t error;
  json_t *document = argc < 2 ? NULL : json_load_file(argv[1], JSON_REJECT_DUPLICATES, &error);
  if (document == NULL) {
    fprintf(stderr, "%s\n", argc < 2 ? "usage: perf_json FILE [NAME|INDEX]..." : error.text);
    return 1;
  }
  const json_t *at = document;
  for (int i = 2; i < argc && at != NULL; i++) {
    at = json_is_array(at) ? json_array_get(at, strtoul(argv[i], NULL, 10)) : json_object_get(at, argv[i]);
  }
  if (json_is_string(at)) {
    puts(json_string_value(at));
  } else if (at != NULL) {
    json_dumpf(at, stdout, JSON_ENCODE_ANY | JSON_COMPACT | JSON_REAL_PRECISION(10));
    putchar('\n');
  }
  int status = at == NULL;
  json_decref(document);
  return status;
}
