// sites.h: where in the kernels threads are ordered, and how one such place is taken out of a run.
//
// Every primitive that orders memory (a barrier, a wait, a fence, a ticket) takes the place of its call as a default
// argument, so a kernel's text does not change. BARLOW_EMULATION_DROP="blocks/reduce.h:27" makes the primitive called
// there do nothing: a fault, planted without compiling anything again. `reached_sites` are those that have run.
#pragma once

#include <cstdlib>
#include <cstring>
#include <set>
#include <string>
#include <utility>

#include "races.h"

namespace barlow {

struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

namespace emulation {

// "blocks/reduce.h", of a path in csrc/.
inline const char* short_name(const char* file) {
  const char* name = file;
  while (const char* next = std::strstr(name, "csrc/")) name = next + 5;
  return name;
}

inline std::set<std::pair<std::string, int>>& reached_sites() {
  static std::set<std::pair<std::string, int>> sites;
  return sites;
}

// The place that this launch leaves out.
struct Drop {
  std::string file;
  int line = 0;
  const char* last_file = nullptr;  // reached last: not looked up again
  int last_line = 0;

  void read() {
    const char* given = std::getenv("BARLOW_EMULATION_DROP");
    const std::string text = given != nullptr ? given : "";
    const size_t colon = text.rfind(':');
    file = text.substr(0, colon);
    line = colon == std::string::npos ? 0 : std::atoi(text.c_str() + colon + 1);
    last_file = nullptr;
  }
};
inline Drop& drop() {
  static Drop drop;
  return drop;
}

// Whether the primitive that is called at `site` does nothing in this run.
inline bool dropped(Site site) {
  const races::Quiet quiet;
  Drop& d = drop();
  if (site.line != d.last_line || site.file != d.last_file) {
    reached_sites().emplace(short_name(site.file), site.line);
    d.last_file = site.file;
    d.last_line = site.line;
  }
  return d.line == site.line && d.file == short_name(site.file);
}

}  // namespace emulation
}  // namespace barlow
