// schedule.h: who runs next. A GPU promises no order, so a launch has several:
//
//     BARLOW_EMULATION_SEED=7          threads, warps, blocks and clusters take turns at random, and what runs by itself
//                                      (cp.async, TMA, wgmma) ends at random; the same seed gives the same run
//     without                          one cluster after the other, its threads in turn, and what runs by itself ends as
//                                      late as allowed: who does not wait sees that
//     BARLOW_EMULATION_ORDER=reverse   the last thread first
//     BARLOW_EMULATION_COPIES=early    the TMA copies at once: who gives a stage away too early sees that
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>

namespace barlow::emulation {

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint32_t operator()(uint32_t below) {  // splitmix64
    uint64_t z = state_ += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return static_cast<uint32_t>((z ^ z >> 31) >> 32) % below;
  }

 private:
  uint64_t state_;
};

struct Schedule {
  uint64_t seed = 0;
  bool seeded = false, reversed = false, early = false;
  Random random{0};

  // A launch's own: the same whatever was launched before.
  void read(const std::string& launch) {
    const auto is = [](const char* name, const char* value) {
      const char* given = std::getenv(name);
      return given != nullptr && std::strcmp(given, value) == 0;
    };
    const char* given = std::getenv("BARLOW_EMULATION_SEED");
    seeded = given != nullptr && *given != '\0';
    seed = seeded ? std::strtoull(given, nullptr, 10) : 0;
    reversed = !seeded && is("BARLOW_EMULATION_ORDER", "reverse");
    early = !seeded && is("BARLOW_EMULATION_COPIES", "early");
    for (const char c : launch) seed = seed * 31 + static_cast<unsigned char>(c);
    random = Random(seed);
  }

  bool chance(uint32_t one_in) { return seeded && random(one_in) == 0; }
};

inline Schedule& schedule() {
  static Schedule schedule;
  return schedule;
}

}  // namespace barlow::emulation
