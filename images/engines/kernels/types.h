// The types of weights.

#pragma once

#include <stdint.h>

enum { BF16, F16, F32 };
