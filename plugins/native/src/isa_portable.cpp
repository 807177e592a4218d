// Plain C++: any processor.
#define IL_ISA portable
#define IL_TABLE isa_portable
#define IL_ISA_NAME "portable"

namespace portable {
static bool supported() { return true; }
}
#include "ops.inc"
