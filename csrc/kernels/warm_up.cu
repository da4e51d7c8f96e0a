// warm_up: every kernel is loaded before a launch has to be quick, or must not load anything.
#include "gpu/device.h"
#include "kernels/hopper_kernels.h"

namespace barlow {

std::vector<ListedKernel> list_kernels() { return listed_kernels(); }

int warm_up(int device) {
  const DeviceGuard guard(device);
  const RelaxedCapture relaxed;
  int count = 0;
  for (const ListedKernel& kernel : listed_kernels()) {
    if (kernel.hopper && !is_hopper(device)) continue;
    kernel.prepare(device);
    ++count;
  }
  return count;
}

}  // namespace barlow
