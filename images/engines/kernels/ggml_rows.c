// What ggml needs to quantize rows as a library of its own, apart from its C files.

#include <pthread.h>

#include "ggml.h"

// ggml takes its lock from C++; with this one the library needs no C++ runtime.
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

void ggml_critical_section_start(void) { pthread_mutex_lock(&lock); }

void ggml_critical_section_end(void) { pthread_mutex_unlock(&lock); }

// The number of types: ggml_type_name has no bound of its own.
int ggml_rows_types(void) { return GGML_TYPE_COUNT; }
