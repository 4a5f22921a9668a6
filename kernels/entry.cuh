// Whether a kernel is compiled. The macro ONLY names the one that is wanted: the others are left empty, which takes no
// time. Without it all are compiled.
#pragma once

constexpr bool wanted(const char* name) {
#ifdef ONLY
  const char* only = ONLY;
  while (*name && *name == *only) name++, only++;
  return *name == *only;
#else
  return *name != 0;
#endif
}
