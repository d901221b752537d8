#include "worker_pool.h"

#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace gatedconv {
namespace {

// How long a worker spins for more work before it sleeps: calls in a row find it awake.
constexpr std::chrono::microseconds kLookout(200);

class Pool {
 public:
  // One pool per process; a fork leaves the parent's threads behind, and with them the parent's pool.
  static Pool& of_process() {
    static std::mutex mutex;
    static Pool* pool = nullptr;  // never destroyed: workers wait in it until the process ends
    static std::atomic<pid_t> owner{0};
    const pid_t self = getpid();
    if (owner.load(std::memory_order_acquire) != self) {
      std::lock_guard<std::mutex> lock(mutex);
      if (owner != self) {
        pool = new Pool;
        owner.store(self, std::memory_order_release);
      }
    }
    return *pool;
  }

  void offer(const std::shared_ptr<Work>& work, int workers) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      offers_.reserve(offers_.size() + static_cast<size_t>(workers));  // what throws comes first
      for (int i = workers; i > 0; --i) offers_.push_back({work, i});
      waiting_.store(static_cast<int>(offers_.size()), std::memory_order_release);
      grow(workers);
    }
    wake_.notify_all();
  }

  void withdraw(const Work* work) {
    std::lock_guard<std::mutex> lock(mutex_);
    std::erase_if(offers_, [&](const Offer& offer) { return offer.work.get() == work; });
    waiting_.store(static_cast<int>(offers_.size()), std::memory_order_release);
  }

 private:
  struct Offer {
    std::shared_ptr<Work> work;
    int worker;
  };

  void grow(int workers) {
    for (; threads_ < workers; ++threads_) {
      try {
        std::thread([this] { help(); }).detach();
      } catch (const std::exception&) {
        return;  // no further thread, or no memory for one: the caller works alone
      }
    }
  }

  void help() {
    for (;;) {
      Offer offer = take();
      offer.work->work(offer.worker);
    }
  }

  Offer take() {
    const auto end = std::chrono::steady_clock::now() + kLookout;
    for (int i = 0; waiting_.load(std::memory_order_acquire) == 0; ++i) {
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
      if (i % 64 == 63 && std::chrono::steady_clock::now() > end) break;
    }
    std::unique_lock<std::mutex> lock(mutex_);
    wake_.wait(lock, [&] { return !offers_.empty(); });
    Offer offer = std::move(offers_.back());
    offers_.pop_back();
    waiting_.store(static_cast<int>(offers_.size()), std::memory_order_release);
    return offer;
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::vector<Offer> offers_;
  std::atomic<int> waiting_{0};
  int threads_ = 0;
};

thread_local ParallelFor parallel_for_in_use = nullptr;
thread_local void* user_in_use = nullptr;

void do_work_elsewhere(Work& work, int workers) {
  struct Context {
    Work& work;
    int workers;
  } context{work, workers};
  const auto task = [](void* given, int index) {
    const Context& all = *static_cast<Context*>(given);
    if (index >= 0 && index < all.workers) all.work.work(index);
  };
  parallel_for_in_use(user_in_use, workers, task, &context);
  work.work(0);  // what those threads have left, if they have
}

}  // namespace

ThreadsInUse::ThreadsInUse(ParallelFor parallel_for, void* user)
    : before_(parallel_for_in_use), user_before_(user_in_use) {
  parallel_for_in_use = parallel_for;
  user_in_use = user;
}

ThreadsInUse::~ThreadsInUse() {
  parallel_for_in_use = before_;
  user_in_use = user_before_;
}

void do_work(const std::shared_ptr<Work>& work, int workers) {
  if (workers <= 1) return work->work(0);
  if (parallel_for_in_use) return do_work_elsewhere(*work, workers);
  Pool& pool = Pool::of_process();
  pool.offer(work, workers - 1);
  work->work(0);
  pool.withdraw(work.get());
}

}  // namespace gatedconv
