// One entry for each vector unit; each is compiled for it in a file of its own.
#pragma once

#include "call.h"

namespace sparseserve {

bool run_portable(Operation operation, Stored stored, const Call& call);
#if defined(__x86_64__)
bool run_avx2(Operation operation, Stored stored, const Call& call);
bool run_avx512(Operation operation, Stored stored, const Call& call);
#endif

}  // namespace sparseserve
