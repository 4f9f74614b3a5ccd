// Calls of functions that the module defines become their bodies, so that a kernel is one list of
// instructions and the checks see through calls. A formal parameter is another name for what the
// call passes; `ret` goes to the end of the body. Recursion cannot be opened and is refused.
#pragma once

#include "ptx_ast.h"

namespace llmkern {
namespace emulator {

Function inline_calls(const Module& module, const Function& entry);

}  // namespace emulator
}  // namespace llmkern
