// SPDX-License-Identifier: Apache-2.0

package load

import (
	"context"
	"errors"
	"net"
	"time"
)

// wait connects to each address in turn until it accepts. Elapsed of the reply is when the last one did; Unsent counts the
// addresses that did not within the limit, Errors the attempts in between.
func wait(ctx context.Context, request Request) (Reply, error) {
	reply := Reply{Began: time.Now()}
	cpu := processCPU()
	limited, cancel := context.WithTimeout(ctx, request.Limit)
	defer cancel()
	pause := time.NewTimer(0)
	defer pause.Stop()
	for i, address := range request.Addresses {
		if err := await(limited, address.String(), request, pause, &reply); err != nil {
			reply.Unsent = int64(len(request.Addresses) - i)
			break
		}
		reply.Elapsed = time.Since(reply.Began)
		reply.Latencies = append(reply.Latencies, int64(reply.Elapsed))
	}
	reply.CPU = processCPU() - cpu
	return reply, ctx.Err()
}

// await returns nil once address has accepted a connection, or the context's error.
func await(ctx context.Context, address string, request Request, pause *time.Timer, reply *Reply) error {
	dialer := net.Dialer{Timeout: request.Timeout}
	for {
		c, err := dialer.DialContext(ctx, "tcp", address)
		if err == nil {
			err = errors.Join(c.(*net.TCPConn).SetLinger(0), c.Close())
		}
		if err == nil {
			return nil
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		reply.count(errorName(err))
		pause.Reset(request.Pause)
		select {
		case <-pause.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
