#include "plans.h"

#include <algorithm>
#include <atomic>
#include <list>
#include <mutex>
#include <utility>

namespace tcur {
namespace {

constexpr size_t kKept = 16;  // of each kind; a model has a few lengths

std::atomic<int64_t>& made() {
  static std::atomic<int64_t> count{0};
  return count;
}

// Plans by the length of tubes. Callers share what they get, so that a plan which is no longer kept
// lives as long as the calls that use it.
template <class Plan>
class Plans {
 public:
  std::shared_ptr<const Plan> get(int64_t n3) {
    if (std::shared_ptr<const Plan> kept = find(n3)) {
      return kept;
    }
    // Made outside of the lock: others need not wait for a long one.
    auto plan = std::make_shared<const Plan>(n3);
    ++made();
    const std::lock_guard<std::mutex> lock(mutex_);
    if (std::shared_ptr<const Plan> kept = find_locked(n3)) {
      return kept;  // another thread was faster
    }
    plans_.emplace_front(n3, plan);
    if (plans_.size() > kKept) {
      plans_.pop_back();
    }
    return plan;
  }

 private:
  using Entry = std::pair<int64_t, std::shared_ptr<const Plan>>;

  std::shared_ptr<const Plan> find(int64_t n3) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return find_locked(n3);
  }
  std::shared_ptr<const Plan> find_locked(int64_t n3) {
    const auto found = std::find_if(
        plans_.begin(), plans_.end(), [&](const Entry& entry) { return entry.first == n3; });
    if (found == plans_.end()) {
      return nullptr;
    }
    plans_.splice(plans_.begin(), plans_, found);
    return found->second;
  }

  std::mutex mutex_;
  std::list<Entry> plans_;  // used last, first
};

// Never destroyed: a thread may still compute while the process exits.
template <class Plan>
Plans<Plan>& plans() {
  static auto* all = new Plans<Plan>;
  return *all;
}

}  // namespace

template <>
std::shared_ptr<const TubeDft<float>> tube_dft(int64_t n3) {
  return plans<TubeDft<float>>().get(n3);
}
template <>
std::shared_ptr<const TubeDft<double>> tube_dft(int64_t n3) {
  return plans<TubeDft<double>>().get(n3);
}

std::shared_ptr<const UnitRoots> unit_roots(int64_t n3) {
  return plans<UnitRoots>().get(n3);
}

int64_t plans_made() {
  return made().load();
}

}  // namespace tcur
