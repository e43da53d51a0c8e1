// Loaded before torch (LD_PRELOAD): lets a torch that is built for CPUs see an accelerator, once device.cpp is loaded.
#include <cstdint>
#include <dlfcn.h>
#include <optional>

#define SEEN __attribute__((visibility("default")))

extern "C" {
SEEN void* pretended_hooks = nullptr;
}

namespace c10 {
enum class DeviceType : int8_t { CPU = 0, CUDA = 1 };
}

namespace at {
struct CUDAHooksInterface;
namespace accelerator {
SEEN std::optional<c10::DeviceType> getAccelerator(bool) {
  if (pretended_hooks == nullptr) return std::nullopt;
  return c10::DeviceType::CUDA;
}
}  // namespace accelerator
namespace detail {
SEEN const CUDAHooksInterface& getCUDAHooks() {
  if (pretended_hooks != nullptr) return *static_cast<CUDAHooksInterface*>(pretended_hooks);
  using Original = const CUDAHooksInterface& (*)();
  static const auto original =
      reinterpret_cast<Original>(dlsym(dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD), "_ZN2at6detail12getCUDAHooksEv"));
  return original();
}
}  // namespace detail
}  // namespace at
