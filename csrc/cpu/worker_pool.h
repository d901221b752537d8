// Threads that help with work which its caller could do alone.
//
// An OpenMP region ends when every thread of the team has come and gone; on a busy machine that means waiting
// for the system to schedule a thread that has nothing left to do, 8 ms or more where the work takes 0.2.
// Here the caller works too, workers that come late find nothing to do, and the caller waits for finished
// tasks, never for threads.
#pragma once

#include <atomic>
#include <memory>

namespace gatedconv {

class Work {
 public:
  virtual ~Work() = default;
  // Takes and does tasks until none is left to take. Called with 0 by the caller and with other numbers by
  // workers, by some of them or by none. Returns from work(0) only when every task is done.
  virtual void work(int worker) = 0;
  // Whether a task could not be done, for lack of memory.
  bool failed() const { return failed_.load(std::memory_order_relaxed); }

 protected:
  // Does a task, on any thread. What it throws ends here: others may still run theirs.
  template <typename Task>
  void attempt(Task task) noexcept {
    try {
      task();
    } catch (...) {
      failed_.store(true, std::memory_order_relaxed);
    }
  }

 private:
  std::atomic<bool> failed_{false};
};

// Somebody's threads: calls task(context, i) once for every i below count, and returns when all have
// returned.
using ParallelFor = void (*)(void* user, int count, void (*task)(void* context, int index), void* context);

// While one exists, do_work of the thread that made it runs on these threads, or on the pool's if they are
// null.
class ThreadsInUse {
 public:
  ThreadsInUse(ParallelFor parallel_for, void* user);
  ThreadsInUse(const ThreadsInUse&) = delete;
  ~ThreadsInUse();

 private:
  ParallelFor before_;
  void* user_before_;
};

// Does the work with up to `workers` threads, the calling one included. Workers may still hold `work`
// afterwards, so outside of its tasks it must touch nothing that it does not own. Throws std::bad_alloc
// before anything is done.
void do_work(const std::shared_ptr<Work>& work, int workers);

}  // namespace gatedconv
